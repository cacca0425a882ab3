// Empty: it lets a function have no body.
