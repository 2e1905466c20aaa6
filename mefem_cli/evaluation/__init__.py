"""From a feature store and a label to scores with intervals: labels, folds, metrics, bootstrap, evaluate."""
