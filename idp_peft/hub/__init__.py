"""What lies in a repository on the Hub: the adapter, its model card, and the push that puts them there."""
