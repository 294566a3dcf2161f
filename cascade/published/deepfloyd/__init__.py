"""DeepFloyd IF, stages I and II."""
