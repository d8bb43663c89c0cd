"""Running both models over a data set to find the strength, and reporting what was found."""
