"""The server: a model behind HTTP, with the page that shows it at work."""
