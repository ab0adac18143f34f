"""The report on a deployment: JSON with a schema, Markdown and HTML."""
