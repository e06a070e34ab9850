"""An HTTP API in OpenAI's style for a base model and any number of adapters."""
