"""The search page, its JSON API, and the client for both: ``onceover serve`` and ``onceover.Client``."""
