"""The whole job on a real model: compress, recover, evaluate, report. See README.md."""
