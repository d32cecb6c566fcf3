"""Values and arithmetic that the whole package uses; imports nothing else of it."""
