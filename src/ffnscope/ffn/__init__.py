"""Where the FFNs of a model are."""
