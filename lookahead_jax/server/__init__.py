"""An HTTP server for an engine, with OpenAI's API; needs the extra `serve`."""
