"""The soak's parts: server, documents, clients, faults, sampling, and the checks afterwards."""
