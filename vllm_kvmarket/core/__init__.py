"""Values and arithmetic that every room uses; imports nothing of the package but itself."""
