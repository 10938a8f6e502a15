"""FedFactory on Ray: one-round federated learning by exchanging generators (FederatedFactory, arXiv 2603.16370)."""
