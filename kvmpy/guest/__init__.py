"""The agent in the guest, seen from the host: commands and files by its protocol (guests/PROTOCOL.md)."""
