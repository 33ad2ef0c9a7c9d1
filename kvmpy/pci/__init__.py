"""PCI as devices need it: configuration space, MSI-X, and the bus that gives functions their places."""
