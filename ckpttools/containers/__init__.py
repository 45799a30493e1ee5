"""Files that hold values: zip archives, pickles, torch files, safetensors, JSON; nothing in them is run."""
