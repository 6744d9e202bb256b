"""The commands ``vgglab plan``, ``vgglab compare`` and so on: their options, and what they print."""
