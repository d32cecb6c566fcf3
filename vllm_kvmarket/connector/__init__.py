"""The only code that knows vLLM's engine: its scheduler half, its worker half, what they say."""
