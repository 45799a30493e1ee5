"""The pass over bytes: what is read (`ranges`), how (`read`, `gather`), and by how many (`threads`)."""
