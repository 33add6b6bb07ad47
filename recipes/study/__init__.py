"""Comparisons: the searches behind them, their pictures, tables and pages."""
