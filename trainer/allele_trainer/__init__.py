"""The trainer: one frozen Megatron-core model, a bank of adapters over it, and a server for drivers' commands."""
