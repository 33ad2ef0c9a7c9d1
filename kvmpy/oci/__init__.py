"""Container images (OCI image specification 1.1, `docker save`) made into disks that a guest can have as its root."""
