"""The strategy behind the server: dispatch, settlement, pricing, broadcast, evaluation."""
