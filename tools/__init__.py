"""Programs that build the environment, the models and the generated documents."""
