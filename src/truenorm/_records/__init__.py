"""What the tools return: frozen dataclasses of plain facts. They know nothing of Keras."""
