"""What the user gave: files behind a location, by name, and the captions among them.

location, download → archive by packed → captions by caption_files.
"""
