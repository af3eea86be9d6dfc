"""What evaluation, fidelity and latents found, as the files that reports are made of.

Each file is described once, as typed classes: who measures writes them, who draws reads them.
"""
