"""What the checks run on several processes: modules with a function ``main(arguments)``, whose result is the answer."""
