"""Samplers as data: timesteps, coefficients, noise, and the loop that runs them. Light."""
