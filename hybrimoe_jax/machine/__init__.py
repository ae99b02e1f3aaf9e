"""What a machine takes: costs, their fit, profiles, and a machine under the virtual clock. Imports no jax."""
