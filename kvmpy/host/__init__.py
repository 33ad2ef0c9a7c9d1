"""Host resources behind devices: terminals, files, sockets."""
