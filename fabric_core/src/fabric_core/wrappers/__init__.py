"""What ``setup`` hands back: the user's own objects, seen through the strategy."""
