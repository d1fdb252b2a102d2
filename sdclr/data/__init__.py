"""Images and captions, from the folder to the batch."""
