"""What measures a user's server and GPU, with the plugin off and on."""
