"""What a deployment found, for programs (JSON with a schema) and for people (Markdown, HTML)."""
