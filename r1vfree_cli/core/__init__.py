"""What everything else stands on: errors, console, prompts, files, processes. Imports nothing of r1v."""
