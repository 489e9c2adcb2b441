"""HTTP in front of an engine, in the words of OpenAI's API; needs the extra `serve`."""
