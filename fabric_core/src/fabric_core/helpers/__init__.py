"""What a training keeps beside its model: objects that users call in their loop and put into a state, all optional."""
