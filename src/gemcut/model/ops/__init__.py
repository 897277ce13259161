"""The operations of the network's layers, one implementation per device; gemcut.model.bind chooses."""
