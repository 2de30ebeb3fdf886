"""Training of the diffusion view: rows answered by the frozen model, its K/V and probabilities kept on disk, and a
transformers Trainer that touches nothing but the view."""
