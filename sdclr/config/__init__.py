"""The one YAML file: its schema, and its reading."""
