"""What a user runs beside the plugin, and real classes without a model. Nothing of the plugin imports this."""
