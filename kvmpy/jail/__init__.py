"""The process locked in: what kvmpy gives up before its guest runs."""
