"""`eps-doctor`: what this machine can do."""
