"""What joins this library to the tools people train with; each module needs its own package and is imported by name."""
