"""The one YAML file: its schema, and its reading."""

import os

# pydantic looks through every installed package for plugins when its first model is made; a config needs none, and is read sooner.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
