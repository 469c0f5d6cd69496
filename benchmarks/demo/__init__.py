"""The main job in its first form: damage a real model, train prompts, measure what came back. See README.md."""
