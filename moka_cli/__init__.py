"""The command `moka`: thin, and it imports the rooms only when a command needs them."""
