"""What steering changed in one answer: the numbers of every step, and a page that shows them."""
