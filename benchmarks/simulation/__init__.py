"""A market in small: reads by agents, a store with a budget, engines, what they save and cost."""
