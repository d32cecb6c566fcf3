"""What builds the environment, the models and the generated documents."""
