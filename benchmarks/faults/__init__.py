"""What strangers, kills and full disks do, by one command each: see README.md."""
